"""Files to arrays: sources (read rows), formats (recognise and normalise), tokenizer and chat (text to tokens),
datasets (tokenised rows and the report), batching (padded arrays) and loader (order and position)."""
