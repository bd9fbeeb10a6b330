"""What runs behind the queue: engines, the batch worker, the aggregator and the index."""
