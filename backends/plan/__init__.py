"""From a graph to a plan that runs: what all targets share."""
