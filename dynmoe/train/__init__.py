"""The training loop, and the protocol that engines implement."""
