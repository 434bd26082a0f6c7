"""What a conversion will do, decided before any array is read."""
