// Goes through USER_FLOW.md in a real browser, and checks both pages. See run.sh --help.

import { randomUUID } from 'node:crypto'
import { mkdir, readFile, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs, stripVTControlCharacters } from 'node:util'
import jsQR from 'jsqr'
import { chromium } from 'playwright-core'
import { PNG } from 'pngjs'
import { OUR_RULE, showEverything, violations } from './accessibility.mjs'
import { SwaggerPage } from './swagger.mjs'

const USER_ID = randomUUID()
// What a laptop shows.
const VIEWPORT = { width: 1280, height: 900 }

const { values: options, positionals: urls } = parseArgs({
  allowPositionals: true,
  options: {
    out: { type: 'string' },
    css: { type: 'string' },
    chromium: { type: 'string', default: '/usr/bin/chromium' },
  },
})
if (urls.length !== 2) {
  console.error('Usage: flow.mjs EVENT_SERVICE_URL BOOKING_SERVICE_URL [--out FOLDER] [--css FILE] [--chromium FILE]')
  process.exit(2)
}

const failures = []
function expect(holds, message) {
  if (!holds) failures.push(message)
}

// For steps whose results the later steps need.
function need(holds, message) {
  if (!holds) throw new Error(message)
}

const work = { clicks: 0, fields: 0, copies: 0, steps: [], front: undefined }

// The person marks an id in an answer and copies it.
function copy(id) {
  work.copies += 1
  return id
}

async function call(swagger, method, path, status, form) {
  const answer = await swagger.execute(method, path, form)
  need(
    answer.status === status,
    `${swagger.name}: ${method} ${path} answered ${answer.status} instead of ${status}: ${JSON.stringify(answer.body)}`,
  )
  return answer
}

// USER_FLOW.md, steps 1 to 7.
async function offerSeats(event) {
  const organizer = await call(event, 'POST', '/api/v1/organizers', 201, {
    body: { name: 'City Stage', contact_email: 'box-office@example.com' },
  })
  const organizerId = copy(organizer.body.organizer_id)
  const show = await call(event, 'POST', '/api/v1/events', 201, {
    body: { organizer_id: organizerId, title: 'Winter Concert', event_type: 'concert' },
  })
  const eventId = copy(show.body.event_id)
  const location = await call(event, 'POST', '/api/v1/locations', 201, {
    body: {
      name: 'Old Mill',
      address: '1 Mill Lane',
      city: 'Berlin',
      country: 'Germany',
      timezone: 'Europe/Berlin',
    },
  })
  const locationId = copy(location.body.location_id)
  const hall = await call(event, 'POST', '/api/v1/locations/{location_id}/halls', 201, {
    parameters: { location_id: locationId },
    body: { name: 'Great Hall', capacity: 100 },
  })
  const hallId = copy(hall.body.hall_id)
  const seats = await call(event, 'POST', '/api/v1/halls/{hall_id}/seats/bulk', 201, {
    parameters: { hall_id: hallId },
    body: { rows: 5, seats_per_row: 10 },
  })
  expect(seats.body.created === 50, `50 seats were asked for, and ${seats.body.created} created`)
  const times = {
    event_id: eventId,
    hall_id: hallId,
    start_time: '2030-12-01T19:00:00Z',
    end_time: '2030-12-01T22:00:00Z',
    base_price: 100.0,
  }
  const session = await call(event, 'POST', '/api/v1/sessions', 201, { body: times })
  const again = await call(event, 'POST', '/api/v1/sessions', 409)
  expect(again.body.code === 'session_overlap', `the same session again is refused by ${again.body.code}`)
  const sessionId = copy(session.body.session_id)
  const map = await call(event, 'GET', '/api/v1/sessions/{session_id}/seats', 200, {
    parameters: { session_id: sessionId },
  })
  const free = map.body.filter(seat => seat.status === 'available')
  expect(free.length === 50, `the seat map shows ${free.length} available seats instead of 50`)
  const [seat] = free
  copy(seat.session_seat_id)
  return { organizerId, eventId, locationId, hallId, sessionId, seat }
}

// The seat's status changes by a message, so the person executes again until it does.
async function expectSeat(event, sold, status) {
  const deadline = performance.now() + 10_000
  let seen
  do {
    const map = await call(event, 'GET', '/api/v1/sessions/{session_id}/seats', 200)
    seen = map.body.find(seat => seat.session_seat_id === sold.seat.session_seat_id).status
  } while (seen !== status && performance.now() < deadline)
  expect(seen === status, `the seat map shows the seat as ${seen} instead of ${status}`)
}

async function reserve(booking, sold, tierId) {
  const { session_seat_id, row_number, seat_number } = sold.seat
  const reservation = await call(booking, 'POST', '/api/v1/reservations', 201, {
    body: {
      session_id: sold.sessionId,
      seats: [{ session_seat_id, price_tier_id: tierId, row_number, seat_number }],
    },
  })
  expect(reservation.body.status === 'active', `the new reservation is ${reservation.body.status}`)
  return copy(reservation.body.id)
}

// Steps 8 to 12. Returns the ticket's id.
async function buy(event, booking, sold) {
  await booking.authorize(USER_ID)
  const tier = await call(booking, 'POST', '/api/v1/admin/price-tiers', 201, {
    body: { name: 'Standard', base_multiplier: 1.0, description: 'Standard pricing' },
  })
  sold.tierId = copy(tier.body.id)
  const reservationId = await reserve(booking, sold, sold.tierId)
  await expectSeat(event, sold, 'reserved')
  const paid = await call(booking, 'POST', '/api/v1/reservations/{id}/confirm', 200, {
    parameters: { id: reservationId },
  })
  expect(paid.body.status === 'confirmed', `the paid reservation is ${paid.body.status}`)
  expect(paid.body.tickets.length === 1, `one seat was paid, and there are ${paid.body.tickets.length} tickets`)
  await expectSeat(event, sold, 'sold')
  return copy(paid.body.tickets[0].id)
}

// The QR code as a scanner sees it: on the screen.
async function scan(booking, ticketId, picture) {
  const answer = await call(booking, 'GET', '/api/v1/tickets/{id}/qr', 200, { parameters: { id: ticketId } })
  const image = answer.shown.locator('img')
  await image.scrollIntoViewIfNeeded()
  const isLoaded = element => element.complete && element.naturalWidth > 0
  await booking.page.waitForFunction(isLoaded, await image.elementHandle())
  await booking.page.screenshot({ path: picture })
  const screen = PNG.sync.read(await readFile(picture))
  const code = jsQR(new Uint8ClampedArray(screen.data), screen.width, screen.height)
  const wanted = `TICKET:${ticketId}`
  expect(code !== null, `no QR code can be read on the screen (${picture})`)
  expect(code === null || code.data === wanted, `the QR code reads ${code?.data} instead of ${wanted}`)
  return code?.data
}

// Steps 13 to 17, with the stream of step 15 open in a tab of its own.
async function changeYourMind(event, booking, sold, ticketId) {
  const stream = await event.page.context().newPage()
  const streamUrl = new URL(`/api/v1/sessions/${sold.sessionId}/seat-map/stream`, event.page.url())
  // Its document never ends, so there is no load to wait for.
  await stream.goto(streamUrl.href, { waitUntil: 'commit' })
  work.front = stream

  const refund = await call(booking, 'POST', '/api/v1/tickets/{id}/refund', 200, { parameters: { id: ticketId } })
  expect(refund.body.status === 'refunded', `the refunded ticket is ${refund.body.status}`)
  await expectSeat(event, sold, 'available')
  const reservationId = await reserve(booking, sold, sold.tierId)
  const parameters = { id: reservationId }
  const cancelled = await call(booking, 'DELETE', '/api/v1/reservations/{id}', 200, { parameters })
  expect(cancelled.body.status === 'cancelled', `the cancelled reservation is ${cancelled.body.status}`)
  await expectSeat(event, sold, 'available')
  const events = await stream.evaluate(() => document.body.innerText)
  for (const status of ['reserved', 'available']) {
    const isSeen = events.split('\n\n').some(text => text.includes('event: change') && text.includes(`"${status}"`))
    expect(isSeen, `the tab with the stream shows no change to ${status}: ${events.slice(0, 500)}`)
  }
  const late = await call(booking, 'POST', '/api/v1/reservations/{id}/confirm', 409, { parameters })
  expect(late.body.code === 'reservation_cancelled', `paying a cancelled reservation is refused by ${late.body.code}`)

  const session = { session_id: sold.sessionId }
  const path = '/api/v1/sessions/{session_id}'
  await call(event, 'PATCH', path, 200, { parameters: session, body: { base_price: 120 } })
  const stale = await call(event, 'PATCH', path, 412, { parameters: { 'If-Match': '"0"' } })
  expect(stale.body.code === 'precondition_failed', `a stale edit is refused by ${stale.body.code}`)
  const used = await call(event, 'DELETE', '/api/v1/organizers/{organizer_id}', 409, {
    parameters: { organizer_id: sold.organizerId },
  })
  expect(used.body.code === 'resource_in_use', `deleting a used organizer is refused by ${used.body.code}`)
  await call(event, 'POST', '/api/v1/sessions/{session_id}/cancel', 200, { parameters: session })
}

// A filter that the page fills in by itself would hide what is there.
async function expectFullLists(swagger, url, ids) {
  const document = await (await fetch(`${url}/openapi/public.json`)).json()
  let count = 0
  for (const [path, item] of Object.entries(document.paths)) {
    const schema = item.get?.responses['200']?.content?.['application/json']?.schema
    if (schema === undefined || !isList(document, schema)) continue
    const names = [...path.matchAll(/\{([^}]*)\}/g)].map(match => match[1])
    const unknown = names.filter(name => !(name in ids))
    if (unknown.length > 0) {
      failures.push(`${swagger.name}: this script has no ${unknown.join(', ')} for the list GET ${path}`)
      continue
    }
    const parameters = Object.fromEntries(names.map(name => [name, ids[name]]))
    const { status, body } = await swagger.execute('GET', path, { parameters })
    const items = Array.isArray(body) ? body : body?.items
    expect(
      items?.length > 0,
      `${swagger.name}: GET ${path} answers ${status} and an empty list with the page's own filters`,
    )
    count += 1
  }
  return count
}

function isList(document, schema) {
  const name = schema.$ref?.split('/').at(-1)
  const known = name === undefined ? schema : document.components.schemas[name]
  return known.type === 'array' || (known.properties?.items !== undefined && 'next_cursor' in known.properties)
}

async function expectGoodPage(swagger) {
  const { name, page } = swagger
  const title = await page.title()
  expect(title.includes(name), `the title of the tab is "${title}", which does not name the ${name}`)
  const viewport = page.locator('meta[name="viewport"]')
  expect((await viewport.count()) === 1, `${name}: the page has no viewport tag, so a phone shows it tiny`)
  const internal = (await swagger.operations()).filter(({ path }) => path.startsWith('/api/internal'))
  expect(internal.length === 0, `${name}: the page shows ${internal.length} internal calls first`)
  return title
}

function expectNoPolicyFault(swagger) {
  for (const error of swagger.consoleErrors.filter(text => /content.security.policy/i.test(text))) {
    failures.push(`${swagger.name}: the browser blocked something: ${error}`)
  }
}

async function newPage(context, name) {
  const page = await context.newPage()
  if (options.css !== undefined) {
    const css = await readFile(options.css, 'utf8')
    await page.route('**/docs/page.css', route => route.fulfill({ contentType: 'text/css', body: css }))
  }
  return new SwaggerPage(name, page, work)
}

// Returns [what is seen, its violations] for the page and for its dialog.
async function checkAccess(browser, name, url, theme, out) {
  const context = await browser.newContext({ viewport: VIEWPORT, colorScheme: theme })
  const swagger = await newPage(context, name)
  await swagger.open(`${url}/docs/`)
  await showEverything(swagger)
  const views = [[`${name}, ${theme}`, await violations(swagger.page)]]
  const picture = join(out, `${name.toLowerCase().replaceAll(' ', '-')}-${theme}`)
  await swagger.page.screenshot({ path: `${picture}.png`, fullPage: true })
  await swagger.openAuthorization()
  views.push([`${name}, ${theme}, authorization`, await violations(swagger.page, '.dialog-ux')])
  await swagger.page.screenshot({ path: `${picture}-authorization.png` })
  await context.close()
  return views
}

function printTable(rows) {
  const widths = rows[0].map((_, column) => Math.max(...rows.map(row => String(row[column]).length)))
  for (const row of rows) {
    const cells = row.map((cell, column) => String(cell).padEnd(widths[column]))
    console.log(cells.join('  ').trimEnd())
  }
}

function printSteps(toTicket, seconds, lists) {
  printTable([
    ['operation', 'answer', 'opened after', 'answer shown after'],
    ...work.steps
      .filter(step => step.openMs !== undefined)
      .map(step => [step.operation, step.status, `${step.openMs} ms`, `${step.shownMs} ms`]),
  ])
  const { clicks, fields, copies } = toTicket
  const slowest = Math.max(...work.steps.map(step => step.openMs ?? 0))
  console.log()
  console.log(`To the ticket: ${clicks} clicks (${fields} into fields), ${copies} ids copied, ${seconds} s.`)
  console.log(`Slowest operation to open: ${slowest} ms. Lists checked: ${lists}.`)
}

function printViolations(views) {
  console.log()
  // The theme changes only colours, so one theme is enough for the other rules.
  const light = views.filter(([view]) => view.includes('light'))
  const row = (view, { rule, impact, count, example }) => [view, rule, impact, count, example]
  console.log('axe-core:')
  printTable([
    ['view', 'rule', 'impact', 'count', 'example'],
    ...light.flatMap(([view, found]) => found.map(fault => row(view, fault))),
  ])
  for (const [view, found] of views) {
    for (const { every } of found.filter(fault => fault.rule === OUR_RULE)) {
      failures.push(`${view}: ${every.length} texts have too little contrast:\n    ${every.join('\n    ')}`)
    }
  }
}

async function main() {
  const out = options.out ?? join(tmpdir(), 'ticketing-pages')
  await mkdir(out, { recursive: true })
  // QUIC and the background work of the browser want the network, which the pages do not need.
  const browser = await chromium.launch({
    executablePath: options.chromium,
    args: [
      '--no-sandbox',
      '--disable-gpu',
      '--disable-quic',
      '--no-first-run',
      '--disable-background-networking',
      '--disable-component-update',
      '--disable-sync',
    ],
  })
  try {
    const context = await browser.newContext({ viewport: VIEWPORT, colorScheme: 'light' })
    const event = await newPage(context, 'Event Service')
    const booking = await newPage(context, 'Booking Service')
    const startedAt = performance.now()
    await event.open(`${urls[0]}/docs/`)
    await booking.open(`${urls[1]}/docs/`)
    const titles = [await expectGoodPage(event), await expectGoodPage(booking)]
    expect(titles[0] !== titles[1], `both tabs have the title "${titles[0]}"`)

    const sold = await offerSeats(event)
    const ticketId = await buy(event, booking, sold)
    const code = await scan(booking, ticketId, join(out, 'ticket.png'))
    const toTicket = { ...work }
    const seconds = ((performance.now() - startedAt) / 1000).toFixed(1)
    console.log(`QR code on the screen: ${code}`)

    const ids = { location_id: sold.locationId, hall_id: sold.hallId, session_id: sold.sessionId, user_id: USER_ID }
    const lists =
      (await expectFullLists(event, urls[0], ids)) + (await expectFullLists(booking, urls[1], ids))
    await changeYourMind(event, booking, sold, ticketId)
    expectNoPolicyFault(event)
    expectNoPolicyFault(booking)
    printSteps(toTicket, seconds, lists)
    await context.close()

    const views = []
    for (const theme of ['light', 'dark']) {
      views.push(...(await checkAccess(browser, event.name, urls[0], theme, out)))
      views.push(...(await checkAccess(browser, booking.name, urls[1], theme, out)))
    }
    printViolations(views)
    await writeFile(join(out, 'violations.json'), JSON.stringify(Object.fromEntries(views), null, 2))
    console.log(`\nScreenshots and all violations: ${out}`)
  } catch (error) {
    failures.push(`the flow stopped: ${stripVTControlCharacters(error.message)}`)
  } finally {
    await browser.close()
  }
  for (const failure of failures) console.error(`failed: ${failure}`)
  if (failures.length > 0) process.exitCode = 1
}

await main()
