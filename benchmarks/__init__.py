"""Speed as ratios: python -m benchmarks. Empty, since a plain worker must import nothing first."""
