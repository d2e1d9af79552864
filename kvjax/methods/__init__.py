"""The methods: each a module or a folder that holds the factory of its own name."""
