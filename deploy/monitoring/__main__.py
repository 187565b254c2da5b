"""``python -m shoal.deploy.monitoring`` writes the Grafana dashboard and the guide's table of metrics."""

from shoal.deploy.monitoring.dashboard import main

main()
