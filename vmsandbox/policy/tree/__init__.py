"""What is known of a project's tree before any of it goes anywhere: by git, by its ignore files, by names."""
