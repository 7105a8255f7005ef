"""From files to padded arrays.

sources.py and file_readers.py read rows. layouts.py is the table of ways to store them, and formats.py recognises which
one it is; examples.py makes prompts and completions of a row, with messages.py, dialogues.py and, for ratings,
labels.py. hf_tokenizer.py, tokenizer.py, chat.py and tokenise.py turn examples into tokens. datasets.py and labelled.py
load whole data sets, held_out.py holds rows out. packing.py and batching.py build arrays; loader.py orders rows; kto.py
pairs them.
"""
