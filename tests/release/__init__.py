"""What a release needs: one version, sound workflows, bounds."""
