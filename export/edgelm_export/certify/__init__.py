"""What a bundle lost against its source: measured, judged, written down."""
