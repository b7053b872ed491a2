"""The order of a training step and what belongs to it; engines fulfil the protocol that lies here."""
