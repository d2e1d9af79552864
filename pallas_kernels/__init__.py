"""One folder per operation: the validated public function and its definition in XLA."""
