"""What all ranks and implementations agree on: layout, handshake, validation, wire, meters."""
