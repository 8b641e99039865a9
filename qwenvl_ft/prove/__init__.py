"""``qwenvl-ft prove``: verifies the promises on the user's own model, data, versions and device."""
