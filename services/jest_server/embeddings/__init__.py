"""Reference embeddings in files: made offline for a whole data set, and looked up where the cache lacks them."""
