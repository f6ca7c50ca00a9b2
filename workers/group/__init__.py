"""A worker of several processes: what its first rank tells the others, in one order, and how they live and die."""
