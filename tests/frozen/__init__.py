"""Trajectories of small training jobs, kept as plain data that later versions must reproduce."""
