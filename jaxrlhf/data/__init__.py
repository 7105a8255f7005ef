"""From files to padded arrays.

sources.py and file_readers.py read rows; formats.py recognises their columns, labels.py parses ratings, and examples.py
normalises rows. hf_tokenizer.py, tokenizer.py, chat.py and tokenise.py turn examples into tokens. datasets.py and
labelled.py load whole data sets. packing.py and batching.py build arrays; loader.py orders rows; kto.py pairs them.
"""
