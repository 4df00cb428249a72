//! The user who makes a request, and the roles that their token grants.

use serde::{Deserialize, Deserializer};
use shared_contracts::ids::UserId;

/// A role granted by the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Buys tickets. It grants nothing beyond being signed in.
    Customer,
    /// Writes the catalogue and the price tiers.
    Organizer,
    /// May do all that an organizer may, sees all reservations and tickets, and replays events.
    Admin,
}

impl Role {
    /// Every role that a token may grant.
    pub const ALL: [Self; 3] = [Self::Customer, Self::Organizer, Self::Admin];

    /// The name in the `roles` claim.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Customer => "customer",
            Self::Organizer => "organizer",
            Self::Admin => "admin",
        }
    }
}

impl std::str::FromStr for Role {
    type Err = &'static str;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|role| role.as_str() == name).ok_or("the roles are customer, organizer and admin")
    }
}

/// A set of roles, one bit each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// Whether the set contains one of `wanted`.
    #[must_use]
    pub fn has_any(self, wanted: &[Role]) -> bool {
        wanted.iter().any(|role| self.0 & (1 << *role as u8) != 0)
    }
}

impl FromIterator<Role> for Roles {
    fn from_iter<I: IntoIterator<Item = Role>>(roles: I) -> Self {
        Self(roles.into_iter().fold(0, |set, role| set | (1 << role as u8)))
    }
}

/// Reads a list of names, as in a token. Unknown names are ignored: they are another system's.
impl<'de> Deserialize<'de> for Roles {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Option::<Vec<String>>::deserialize(deserializer)?.unwrap_or_default();
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }
}

/// The user who makes the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The `sub` of the token, or the UUID in `X-User-ID`.
    pub user_id: UserId,
    /// The roles of the token; empty in `AUTH_MODE=header`, where no route demands a role.
    pub roles: Roles,
}

impl Caller {
    /// The user whose reservations and tickets the caller may see and change. It is the caller; `None` for an admin,
    /// who may see and change those of all users. A statement says `where … and ($n::uuid is null or user_id = $n)`.
    #[must_use]
    pub fn confined_to(&self) -> Option<UserId> {
        (!self.roles.has_any(&[Role::Admin])).then_some(self.user_id)
    }
}
