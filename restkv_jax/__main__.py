from restkv_jax.commands.cli import main

raise SystemExit(main())
