"""Drawing tokens: sampling, and the native engine with continuous batching."""
