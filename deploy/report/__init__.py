"""`shoal report`: what one or several runs did, as one HTML page."""
