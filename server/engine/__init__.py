"""The inference engine: scheduling, paging, batching, sampling, and the process around them."""
