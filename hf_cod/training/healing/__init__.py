"""A smaller model learns from the one that it came from: what it lost is recovered, what it saved stays saved."""
