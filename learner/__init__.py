"""The learner: queues trajectories, updates the policy, publishes weights, and accounts for every environment step."""
