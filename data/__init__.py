"""Turn text into rows of tokens: read documents, tokenise and pack them, and choose the order of the rows."""
