"""Examples named by reference: reading, decoding and preprocessing them."""
