"""Code generation: kernel templates, schedules, building and the content-addressed cache."""
