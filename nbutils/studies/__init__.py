"""Many runs: planned from a YAML file, made by papermill, stored as records, resumed."""
