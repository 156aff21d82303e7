// Placeholder until the step program is written.
