"""Files to arrays: sources (rows), formats (what their columns mean), pretrained, tokenizer and chat (text and ids),
sequences (ids, masks, cutting), datasets (splits and the report), batching (padded arrays), loader (order)."""
