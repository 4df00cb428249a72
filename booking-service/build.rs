//! Rebuilds when a migration changes, which is compiled into the binary, or what the statements are checked by.

fn main() {
    for path in ["migrations", ".sqlx", "sqlx.toml"] {
        println!("cargo:rerun-if-changed={path}");
    }
}
