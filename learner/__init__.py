"""The right side: takes trajectories in, updates the policy, publishes weights, keeps the books."""
