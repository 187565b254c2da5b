"""Ray: sessions, the running cluster, and learners in processes of their own."""
