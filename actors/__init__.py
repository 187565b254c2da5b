"""The left side: rollout workers that make trajectories, and the pool that keeps them alive."""
