from restkv_jax.commands.main import main

raise SystemExit(main())
