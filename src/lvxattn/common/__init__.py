"""Code shared by all implementations: layout, handshake, validation, masks, wire, meters."""
