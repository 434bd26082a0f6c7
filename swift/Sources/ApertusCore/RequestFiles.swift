import Foundation

/// What a request is made of, in files of JSON as OpenAI writes it.
package enum RequestFiles {
    /// The messages in a file: a list of them, or an object whose `messages` is one.
    ///
    /// - Throws: `ApertusError`: `notFound`, if there is no such file, `rejected`, if it is damaged,
    ///   or no conversation.
    package static func messages(_ url: URL) throws -> [Message] {
        try messages(data(url), name: url.filePath)
    }

    /// The messages in JSON; `name` is what errors call it.
    package static func messages(_ data: Data, name: String) throws -> [Message] {
        try rejecting {
            let messages = try Message.list(list(data, "messages", name))
            _ = try Turn.read(messages)
            return messages
        }
    }

    /// The tools in a file: a list of definitions, or an object whose `tools` is one.
    ///
    /// - Throws: see `messages`.
    package static func tools(_ url: URL) throws -> [ToolDefinition] {
        try rejecting { try ToolDefinition.list(list(data(url), "tools", url.filePath)) }
    }

    /// All of a file that the user named, which may be a link to anywhere.
    private static func data(_ url: URL) throws -> Data {
        guard ModelFile.exists(url) else {
            throw ApertusError(.notFound, "\(url.filePath): there is no such file")
        }
        return try readFile(url.resolvingSymlinksInPath(), atMost: ModelFile.mostText)
    }

    private static func list(_ data: Data, _ key: String, _ name: String) throws -> Given {
        let bytes = data.starts(with: [0xEF, 0xBB, 0xBF]) ? data.dropFirst(3) : data
        var given = try Given.read(bytes, as: name)
        if given.value?.members != nil { given = Given(given.value?[key], at: "\(name): \(key)") }
        guard let items = given.value?.items else {
            throw refusal(name, "expected a list of \(key), or an object whose '\(key)' is one")
        }
        guard !items.isEmpty else { throw refusal(name, "there is no \(key.dropLast())") }
        return given
    }

    /// What is wrong with a file is no wrong usage.
    private static func rejecting<R>(_ body: () throws -> R) throws -> R {
        do {
            return try body()
        } catch let error as ApertusError where error.kind == .usage {
            throw ApertusError(.rejected, error.description)
        }
    }
}
