"""Between text and token ids: the tokenizer, the stream back to text, the chat template."""
