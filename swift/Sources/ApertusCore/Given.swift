/// A value that a caller gave as JSON, and its place, such as `messages[3].tool_call_id`.
struct Given {
    /// Nil where there is none, or null.
    let value: JSON?
    let place: String

    init(_ value: JSON?, at place: String) {
        self.value = value == .null ? nil : value
        self.place = place
    }

    /// - Throws: `ApertusError`, if `json` is none.
    static func read(_ json: some Collection<UInt8>, as name: String) throws -> Given {
        do {
            return Given(try JSON(json), at: name)
        } catch {
            throw refusal(name, "is not valid JSON (\(error))")
        }
    }

    subscript(key: String) -> Given {
        get throws { Given(try object()[key], at: "\(place).\(key)") }
    }

    /// Whether Python would take it for true.
    var isTruthy: Bool { value?.isTruthy ?? false }

    func object() throws -> JSON {
        guard let value, value.members != nil else { throw wrong("an object") }
        return value
    }

    func list(_ words: String = "a list") throws -> [Given] {
        guard let items = value?.items else { throw wrong(words) }
        return items.enumerated().map { Given($1, at: "\(place)[\($0)]") }
    }

    func text() throws -> String {
        guard let text = value?.text else { throw wrong("a text") }
        return text
    }

    /// The name in a call.
    func calledName() throws -> String {
        let name = try text()
        guard isCalledName(name.utf8) else {
            throw refuse("\(beginning(of: name)): \(calledNameRule)")
        }
        return name
    }

    /// The name of a function.
    func name() throws -> String {
        let name = try text()
        guard isFunctionName(name) else {
            throw refuse("\(beginning(of: name)): \(functionNameRule)")
        }
        return name
    }

    /// The value, an object in which every number is one.
    func data() throws -> JSON {
        let value = try object()
        try requireFinite()
        return value
    }

    private func requireFinite() throws {
        switch value {
        case .object(let members):
            for each in members {
                let name = String(decoding: each.key, as: UTF8.self)
                try Given(each.value, at: "\(place).\(name)").requireFinite()
            }
        case .array: for each in try list() { try each.requireFinite() }
        case .number(let digits):
            guard value?.double != nil else {
                throw refuse("\(digits.prefix(40)) is too large a number")
            }
        default: break
        }
    }

    func refuse(_ words: String) -> ApertusError { refusal(place, words) }

    private func wrong(_ expected: String) -> ApertusError {
        let found =
            switch value {
            case .object: "an object"
            case .array: "a list"
            case .string: "a text"
            case .number: "a number"
            case .bool: "true or false"
            case .null, nil: "null"
            }
        return refuse("expected \(expected), not \(found)")
    }
}
