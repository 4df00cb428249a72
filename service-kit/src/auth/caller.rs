//! The user who makes a request, and the roles that their token grants.

use serde::{Deserialize, Deserializer};
use shared_contracts::ids::UserId;

/// What a token says its bearer may do, beyond what everyone may who is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Buys tickets. Everyone who is known may, so this role is for show.
    Customer,
    /// Writes the catalogue and the price tiers.
    Organizer,
    /// Does all that an organizer may, sees all reservations and tickets, and replays events.
    Admin,
}

impl Role {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Customer, Self::Organizer, Self::Admin];

    /// The name that tokens have for it.
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

/// A set of roles.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Roles(u8);

impl Roles {
    /// Whether one of `wanted` is among them.
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

/// As in a token: a list of names, of which the unknown ones are another system's.
impl<'de> Deserialize<'de> for Roles {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let names = Option::<Vec<String>>::deserialize(deserializer)?.unwrap_or_default();
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }
}

/// The user who makes the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Their id.
    pub user_id: UserId,
    /// What else they may do. None in `AUTH_MODE=header`, where no role is asked for.
    pub roles: Roles,
}

impl Caller {
    /// Whose reservations and tickets they may see and change: their own, or for an admin everyone's (`None`). A
    /// statement says `where … and ($n::uuid is null or user_id = $n)`.
    #[must_use]
    pub fn confined_to(&self) -> Option<UserId> {
        (!self.roles.has_any(&[Role::Admin])).then_some(self.user_id)
    }
}
