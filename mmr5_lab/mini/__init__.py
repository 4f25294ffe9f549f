"""The miniature: small documents and a small model of the real classes."""
