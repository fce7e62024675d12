"""What there is to learn: `addition` makes its own data, `text` reads files."""
