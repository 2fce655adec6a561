"""Models with many zeros, stored without them and run faster for it on CPUs."""
