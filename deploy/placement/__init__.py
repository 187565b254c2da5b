"""Who acts and who learns, and where, on the hardware there is."""
