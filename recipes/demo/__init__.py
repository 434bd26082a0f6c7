"""The recipe of the embedded model: facts, wordings, corpus, tokenizer, training and exam."""
