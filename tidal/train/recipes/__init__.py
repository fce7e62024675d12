"""What there is to learn: `addition` and `characters` make their own data, `text` reads files."""
