"""Files that start shoal elsewhere: the installer, the image, Kubernetes, Ray clusters and SLURM."""
