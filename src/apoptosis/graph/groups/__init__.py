"""From ties and pins to groups of channels and the sites that read them."""
