"""What the measurement of several processes is made of: links, one rank, the cost model, tables."""
