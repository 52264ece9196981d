"""What the user asked for: the schema, its loading and overrides, presets, targets."""
