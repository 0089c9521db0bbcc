"""Several HTTP processes on one port: a parent that starts engines and front ends, and what they tell each other."""
